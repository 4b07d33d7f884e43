"""Products with a rank's cut of a weight: torch's and oneDNN's (dense), in C++ (native)."""
