"""Speed-up of ISD over AR on hardware that is not at hand: a model of it, not a measurement (docs/simulation.md)."""
