"""Make a tiny Llama with random weights, a tokenizer and a chat template: real enough for vLLM, small enough for a CPU.

    DIR/bin/python tiny_model.py OUT         (the python of the vLLM environment: it has torch and transformers)

Two layers of 256, 3.7 million parameters, 8 MB, some ten seconds. Nothing is downloaded: the tokenizer learns its
pieces from the source of Python's own standard library. What the model says is noise; how long it takes is real.
"""

from __future__ import annotations

import argparse
import sys
import sysconfig
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 8192
CONTEXT = 4096
PAD, BEGIN, TURN, END = "<|pad|>", "<|bos|>", "<|im_start|>", "<|im_end|>"
TEMPLATE = (
    "{%- for message in messages -%}"
    f"{TURN}{{{{ message.role }}}}\n{{{{ message.content }}}}{END}\n"
    "{%- endfor -%}"
    f"{{%- if add_generation_prompt -%}}{TURN}assistant\n{{%- endif -%}}"
)


def train_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE over the standard library's modules."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, BEGIN, TURN, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train(sorted(str(p) for p in Path(sysconfig.get_path("stdlib")).glob("*.py")), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token=PAD, bos_token=BEGIN, eos_token=END, model_max_length=CONTEXT
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Random weights, the same ones every time."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config).to(torch.bfloat16)


def main() -> None:
    """Write the model into the folder that the command line names."""
    parser = argparse.ArgumentParser(description="Make a tiny random Llama for vLLM.")
    parser.add_argument("out", type=Path, help="folder to write")
    out = parser.parse_args().out
    tokenizer = train_tokenizer()
    tokenizer.save_pretrained(out)
    make_model(tokenizer).save_pretrained(out)
    sys.stdout.write(f"{out}: {len(tokenizer)} tokens, {sum(p.stat().st_size for p in out.iterdir()) / 1e6:.1f} MB\n")


if __name__ == "__main__":
    main()
