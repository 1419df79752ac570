"""Resources of the machine: cores, memory, files, devices."""
