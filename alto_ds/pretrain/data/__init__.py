"""From text to batches of tokens: ``text``, then ``tokenizer``, then ``sequences``."""
