"""The experiment: Megalodon against a Llama on byte-level Wikipedia text."""
