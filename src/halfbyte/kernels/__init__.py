"""The operations that the compiler cannot see through: one folder an op, each with a reference and its fast twins."""
