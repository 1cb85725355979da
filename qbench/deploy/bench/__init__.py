"""How fast a recipe runs: backends that compute with its codes, timed in turns with the floating-point model."""
