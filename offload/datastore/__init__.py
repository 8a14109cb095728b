"""Texts to find continuations in: a file of tokens and of their places, sorted by what came before them. How it is laid out,
how it is made of any number of texts in bounded memory, and how it is read through a memory map.

Knows nothing of models: whoever builds one brings a tokenizer's function.
"""
