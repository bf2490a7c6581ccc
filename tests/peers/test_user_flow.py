"""circuit-tracer as its users run it: a model, a tokenizer and transcoders on disk, text in, its command line."""

from __future__ import annotations

import json
import logging
import sys
import urllib.request
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import circuit_tracer
import pair
import pytest
import torch
import yaml
from circuit_tracer import __main__ as command_line
from circuit_tracer.frontend.local_server import serve
from circuit_tracer.graph import Graph
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import pycircuit as pc
from pycircuit.integrations.circuit_tracer import accelerate, attribute

SIZE, ACTIVE, SET = pair.Size(), 6, "org/tiny"
KINDS = {"set": pair.Kind(), "cross": pair.Kind(cross=True, reads="resid_mid")}
PROMPT = "w5 w6 w7 w8"


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model/ with its tokenizer, and transcoders where circuit-tracer keeps those it has fetched."""
    folder = tmp_path_factory.mktemp("disk")
    pair.language_model("llama", SIZE, torch.float32).save_pretrained(folder / "model")
    words = ["<bos>", "<unk>", *(f"w{i}" for i in range(SIZE.vocabulary - 2))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", unk_token="<unk>")
    fast.save_pretrained(folder / "model")
    for name, kind in KINDS.items():
        weights = pair.transcoder_weights(kind, SIZE, torch.float32, ACTIVE)
        stored, place = (
            pair.circuit_tracer_transcoders(kind, weights, SIZE, torch.float32),
            folder / "cache" / f"{SET}-{name}",
        )
        stored.to_safetensors(str(place))
        model_kind = "cross_layer_transcoder" if kind.cross else "transcoder_set"
        about = {"model_kind": model_kind, "scan": SET, "model_name": str(folder / "model")}
        about |= {"feature_input_hook": stored.feature_input_hook, "feature_output_hook": stored.feature_output_hook}
        (place / "config.yaml").write_text(yaml.safe_dump(about))
    return folder


@pytest.fixture(autouse=True)
def there(disk: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("CIRCUIT_TRACER_CACHE_DIR", str(disk / "cache"))
    root, level, handlers = logging.getLogger(), logging.getLogger().level, list(logging.getLogger().handlers)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Full backward hook is firing")
        yield
    root.handlers[:] = handlers
    root.setLevel(level)


def run(kind: str, out: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Graph, dict[str, Any]]:
    """`circuit-tracer attribute`: the graph it saves and the file for its page."""
    arguments = ["attribute", "-t", f"{SET}-{kind}", "-p", PROMPT, "-o", str(out / "g.pt"), "--backend", "nnsight"]
    arguments += ["--max_feature_nodes", "40", "--batch_size", "16", "--slug", "tiny", "--graph_file_dir", str(out)]
    monkeypatch.setattr(sys, "argv", ["circuit-tracer", *arguments])
    out.mkdir()
    command_line.main()
    return Graph.from_pt(str(out / "g.pt")), json.loads((out / "tiny.json").read_text())


@pytest.mark.parametrize("kind", KINDS)
def test_their_command_line(kind: str, disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its words, with lazy decoders as it has them; files that we read, and that its page gets."""
    theirs, page = run(kind, tmp_path / "theirs", monkeypatch)
    with accelerate():
        ours, our_page = run(kind, tmp_path / "ours", monkeypatch)
    assert circuit_tracer.attribute.__module__ == "circuit_tracer.attribution.attribute"
    assert ours.input_string == theirs.input_string == f"<unk> {PROMPT}" and ours.scan == theirs.scan == SET
    assert torch.equal(ours.selected_features, theirs.selected_features) and ours.logit_targets == theirs.logit_targets
    difference = (ours.adjacency_matrix - theirs.adjacency_matrix).norm() / theirs.adjacency_matrix.norm()
    assert 0 < difference < 1e-5  # two programs
    shown = [[node["node_id"] for node in of["nodes"]] for of in (our_page, page)]
    assert shown[0] == shown[1] and len(shown[1]) > 10
    assert our_page["metadata"] == page["metadata"]
    again = pc.Graph.from_circuit_tracer(tmp_path / "ours" / "g.pt")
    assert again.rows.count == 40 + len(ours.logit_targets) and again.provenance["scan"] == SET
    server = serve(data_dir=str(tmp_path / "ours"), port=0)
    try:
        port = server.httpd.server_address[1]
        with urllib.request.urlopen(f"http://localhost:{port}/data/tiny.json") as answer:
            assert json.load(answer) == our_page
    finally:
        server.stop()


@pytest.mark.parametrize("prompt", [PROMPT, "<bos> w5", "w3", "<bos>", "", "w5 unheard of"])
def test_text_of_any_kind(prompt: str, disk: Path) -> None:
    """With its opening token and without, one word, none. Theirs has no graph of the opening token alone."""
    from circuit_tracer.utils.hf_utils import load_transcoder_from_hub

    stored, about = load_transcoder_from_hub(f"{SET}-set", lazy_encoder=True)
    model = circuit_tracer.ReplacementModel.from_pretrained_and_transcoders(
        about["model_name"], stored, backend="nnsight", device=torch.device("cpu")
    )
    if not prompt:
        for function in (attribute, circuit_tracer.attribute):
            with pytest.raises(IndexError, match="out of bounds"):
                function(prompt, model)
        return
    ours = attribute(prompt, model, attribution_targets=["w3", "w4"])
    assert [t.token_str for t in ours.logit_targets] == ["w3", "w4"] and ours.input_tokens[0] < 2
    if prompt == "<bos>":
        assert ours.input_tokens.tolist() == [0] and ours.adjacency_matrix.shape == (3 + 1 + 2,) * 2
        return
    theirs = circuit_tracer.attribute(prompt, model, attribution_targets=["w3", "w4"], batch_size=16)
    assert ours.input_string == theirs.input_string and torch.equal(ours.input_tokens, theirs.input_tokens)
    assert torch.equal(ours.active_features, theirs.active_features)
    assert torch.allclose(ours.adjacency_matrix, theirs.adjacency_matrix, rtol=1e-4, atol=1e-5)
