"""What the program takes from its machine: cores, memory, files, devices."""
