"""How many dims a token takes in one cache: merging of heads, and low rank."""
