"""Show-o2 (arXiv:2506.15564): a Qwen2.5 that reads and draws latents of Wan 2.1 by a flow."""
