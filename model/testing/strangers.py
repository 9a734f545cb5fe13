"""A CLIP and a causal language model, random and tiny: what they say is garbage, but it is their
kind's arithmetic.

Needs:       transformers.
Gives:       write_clip(), write_language_model().
"""
from pathlib import Path

import torch
import transformers
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from model.testing.checkpoints import unlike_new
from model.toy import world
from model.toy.bpe import write_tokenizer

SHAPE = dict(hidden_size=24, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
WORDS = ["<s>", "</s>", "<unk>", "\n", "a", "red", "blue", "ball", "box", "ring", "with", "in",
         "on", "park", "USER", "BOT"]


def write_clip(folder: Path) -> Path:
    """Of images of 32 pixels and prompts of 16 tokens. Returns the folder."""
    ids = write_tokenizer(folder, world.vocabulary(), 16)
    text = dict(SHAPE, max_position_embeddings=16, **ids)
    config = transformers.CLIPConfig(text_config=text, projection_dim=20,
                                     vision_config=dict(SHAPE, image_size=32, patch_size=8))
    torch.manual_seed(0)
    unlike_new(transformers.CLIPModel(config)).save_pretrained(folder)
    crop = {"height": 32, "width": 32}
    transformers.CLIPImageProcessor(size={"shortest_edge": 32},
                                    crop_size=crop).save_pretrained(folder)
    return folder


def write_language_model(folder: Path) -> Path:
    """Of 16 words. Returns the folder."""
    ids = {word: i for i, word in enumerate(WORDS)}
    words = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n|[^\s]+"), "removed", invert=True)
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=len(WORDS), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, bos_token_id=0, eos_token_id=1)).save_pretrained(folder)
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>",
                                         unk_token="<unk>").save_pretrained(folder)
    return folder
