"""One file per algorithm; the dotted path in `conf/algo/*.yaml` is the only registry."""
