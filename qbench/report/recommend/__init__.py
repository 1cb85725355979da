"""The recipe that meets constraints, how sure that is, and why the others lost."""
