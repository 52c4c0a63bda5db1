"""Reports: what a study found, for people. Data first, then drawing; a report sees values, never a study."""
