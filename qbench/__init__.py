"""qbench: which quantization recipe should I use for this model, and how sure can I be?"""
