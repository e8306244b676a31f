"""The Mixture-of-Transformers core: sequence rules, transformer with cache, sampling and replay."""
