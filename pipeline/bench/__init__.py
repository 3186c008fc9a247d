"""Measurements behind the program's claims about speed, each interleaved with the code it is compared with."""
