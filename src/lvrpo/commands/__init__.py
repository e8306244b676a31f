"""The commands: each a thin function over the library, with its options."""
