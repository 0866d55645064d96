"""C++ operators behind a plain C interface, compiled by the user's compiler at first use; see build.py."""
