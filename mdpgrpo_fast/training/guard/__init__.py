"""What a run is guarded against: another run in its directory, signals, full disks, numbers that are not finite."""
