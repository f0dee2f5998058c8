"""Published SwissArmyTransformer checkpoints: reading, converting, writing."""
