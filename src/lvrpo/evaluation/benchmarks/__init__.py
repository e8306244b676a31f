"""Published benchmarks: their prompts from local folders, their scorers, and what each needs."""
