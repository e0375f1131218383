def write(*a): return "stub"
