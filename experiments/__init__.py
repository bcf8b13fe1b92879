"""Hydra entry points. They import theria; theria never imports them."""
