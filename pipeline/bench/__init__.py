"""What the program's claims about speed and memory rest on: measured here and now, with the other side measured beside."""
