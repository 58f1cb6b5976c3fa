"""Models by their shape alone: what a block weighs, and a folder that vLLM starts without weights.

The numbers are those of the models' published `config.json`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Shape:
    """A decoder of the Llama family."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int
    positions: int  #: longest context in tokens
    rope_theta: float = 10_000.0

    @property
    def kv_bytes_per_token(self) -> int:
        """Keys and values of all layers, two bytes each."""
        return self.layers * 2 * self.kv_heads * (self.hidden // self.heads) * 2

    def write_folder(self, folder: Path) -> Path:
        """Make `folder` a model for vLLM's `load_format="dummy"`, without a tokenizer."""
        folder.mkdir(parents=True, exist_ok=True)
        config = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "torch_dtype": "bfloat16",
            "num_hidden_layers": self.layers,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": self.positions,
            "rope_theta": self.rope_theta,
            "rms_norm_eps": 1e-5,
            "hidden_act": "silu",
            "bos_token_id": 1,
            "eos_token_id": 2,
            "tie_word_embeddings": False,
        }
        (folder / "config.json").write_text(json.dumps(config, indent=1))
        return folder


SHAPES = {
    "llama-2-7b": Shape(32, 4096, 11008, 32, 32, 32000, 4096),
    "llama-3-8b": Shape(32, 4096, 14336, 32, 8, 128256, 8192, 500_000.0),
    # For a CPU: the KV bytes of SmolLM2-135M in a fraction of its layers' work.
    "tiny": Shape(4, 256, 512, 4, 4, 1000, 2048),
}
