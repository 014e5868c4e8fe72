"""The integrations, each with the library it serves; where that is not installed, its tests say so and skip."""
