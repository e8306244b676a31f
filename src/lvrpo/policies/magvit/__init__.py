"""What Show-o and MMaDA share: MAGVIT-v2 tokens in the rows of a language model, drawn by masked decoding."""
