"""lm-eval tasks that have no usable stock task: one folder a family, YAML with the functions it names."""
