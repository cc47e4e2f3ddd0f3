"""Methods: functions from a layer's problem to its update."""
