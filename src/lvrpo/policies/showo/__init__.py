"""Show-o (arXiv:2408.12528): a Phi-1.5 that reads MAGVIT-v2 tokens of images and draws them by masked decoding."""
