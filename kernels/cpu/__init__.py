"""CPU operators in C++: sources, compiler, loader."""
