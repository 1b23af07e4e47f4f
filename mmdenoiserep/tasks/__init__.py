"""What single tasks need besides the method; each module is imported by its own name, since it needs its library."""
