"""Tokens that features are most active on in texts, from a folder that `pc.write_examples` wrote."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from pycircuit.graph.io.page_json import feature_id

from .plain_tokens import plain, shorten

MOST = 0.5  # frequency above which a feature is active on most tokens
_SHARE = 0.15  # of the activation in the top texts, which a token must have to be named beside the first
_LARGEST_FILE = 16 << 20  # bytes


class ExampleTokens:
    """Example files of a transcoder set. folder: with one {id}.json a feature, or with one features/SCAN in it."""

    def __init__(self, op: str, folder: str | os.PathLike[str]) -> None:
        self.op = op
        self.folder = _folder_of_files(op, Path(folder))

    def active(self, layer: int, feature: int) -> tuple[list[str], bool] | None:
        """(texts of the tokens it is most active on, True if it is active on most), or None without its file."""
        path = self.folder / f"{feature_id(layer, feature)}.json"
        if not path.is_file():
            return None
        try:
            if path.stat().st_size > _LARGEST_FILE:
                raise ValueError(f"{path.stat().st_size} bytes")
            content = json.loads(path.read_bytes())
            if content["index"] != feature:
                raise ValueError(f"feature {content['index']}")
            return _strongest(content), float(content["activation_frequency"]) > MOST
        except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
            raise ValueError(
                f"{self.op}: labels must be a folder of pc.write_examples, got {path} of another form ({error!r}); "
                "write it again"
            ) from None


def _folder_of_files(op: str, folder: Path) -> Path:
    if not folder.is_dir():
        raise FileNotFoundError(f"{op}: labels must be a folder of pc.write_examples, got {folder}, which is none")
    if _has_files(folder):
        return folder
    sets = [path for path in sorted((folder / "features").glob("*")) if path.is_dir() and _has_files(path)]
    if len(sets) != 1:
        names = ", ".join(str(path.relative_to(folder)) for path in sets) or "none"
        raise ValueError(
            f"{op}: labels must be a folder of pc.write_examples with one set of features, got {folder} with {names}; "
            "name the set's own folder"
        )
    return sets[0]


def _has_files(folder: Path) -> bool:
    return any(path.suffix == ".json" and path.stem.isdecimal() for path in folder.iterdir())


def _strongest(content: dict[str, Any]) -> list[str]:
    """Texts of the tokens that a feature's highest activations are on, by their sums."""
    sums: dict[str, float] = {}
    texts: dict[str, str] = {}
    for group in content["examples_quantiles"][:1]:
        for example in group["examples"]:
            place = example["train_token_ind"]
            text = shorten(plain(str(example["tokens"][place])))
            key = text.casefold()
            texts.setdefault(key, text)
            sums[key] = sums.get(key, 0.0) + float(example["tokens_acts_list"][place])
    order = sorted(sums, key=lambda key: -sums[key])
    least = _SHARE * sum(sums.values())
    return [texts[key] for i, key in enumerate(order) if i == 0 or sums[key] >= least]
