"""The tables of the pages, each from committed measurements or from the package itself."""
