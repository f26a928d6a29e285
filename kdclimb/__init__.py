"""kdclimb: budgeted knowledge-distillation hill climbs for the NanoGPT speedrun."""
