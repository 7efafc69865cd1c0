"""How an adapted weight meets an activation: dots, convolutions, rows of a table, dropout."""
