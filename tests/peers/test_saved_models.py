"""Folders of models that version 5 of transformers wrote, as the version that circuit-tracer needs reads them."""

from __future__ import annotations

import json
from pathlib import Path

import transformers
from transformers import LlamaConfig

from pycircuit.model.portable_folder import make_portable


def test_the_rotary_base_of_version_5_is_found(tmp_path: Path) -> None:
    assert transformers.__version__.startswith("4.")
    config = json.loads(LlamaConfig().to_json_string())
    del config["rope_theta"], config["rope_scaling"]
    config["rope_parameters"] = {"rope_theta": 1e5, "rope_type": "default"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert LlamaConfig.from_pretrained(tmp_path).rope_theta == 1e4  # passed over in silence
    make_portable(tmp_path)
    assert LlamaConfig.from_pretrained(tmp_path).rope_theta == 1e5
