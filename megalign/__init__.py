"""megalign: an end-to-end alignment stack for open-ended dialogue models, Megatron-style."""

__version__ = "0.1.0"
