"""What single tasks need besides the method; what needs a library of its own is imported by its own name."""
