"""Other formats: one reader each, one writer; and export to LeRobot."""
