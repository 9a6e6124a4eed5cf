"""Trains a tokenizer on the embedded domain's documents.

    python -m experiments.train_tokenizer --config=configs/train_tokenizer.py \
        --workdir=runs/tokenizer

Seconds, to 512 tokens of 2.4 bytes each on held-out documents. On text of your
own, with the tokens and the template of chats:

    python -m experiments.train_tokenizer \
        --config=configs/train_tokenizer.py:chat --workdir=runs/tokenizer

with --config.documents.source=text:FILE and --config.heldout_documents.source
likewise, or a JSONL file of {"text"} or demonstrations.
"""

from ml_collections import ConfigDict

from configs import common

# Of ChatML: "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n".
CHAT_TOKENS = ("<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def get_config(arg: str = common.FULL) -> ConfigDict:
  """full, smoke (a few documents), or chat: with ChatML."""
  common.check_arg(arg, common.FULL, common.SMOKE, "chat")
  smoke, chat = arg == common.SMOKE, arg == "chat"
  return ConfigDict(
      dict(
          seed=0,
          documents=common.source(common.ASSISTANT, 600 if smoke else 30_000),
          heldout_documents=common.source(
              common.ASSISTANT, 100 if smoke else 1_000
          ),
          vocab_size=512,
          special_tokens=CHAT_TOKENS if chat else (),
          chat_template=CHAT_TEMPLATE if chat else "",
      )
  )
