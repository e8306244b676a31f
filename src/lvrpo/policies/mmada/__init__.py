"""MMaDA (arXiv:2505.15809): a LLaDA that reads MAGVIT-v2 tokens, and writes and draws by masked decoding."""
