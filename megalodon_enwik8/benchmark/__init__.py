"""Speed, memory and operations of both models: python -m megalodon_enwik8.benchmark"""
