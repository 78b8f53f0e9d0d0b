"""One mechanism a file, built on :mod:`mmtoken.tokens`."""
