<<<<<<< HEAD
"""Speculative decoding: a drafter proposes several tokens, the target checks them in one step."""
=======
"""Speculation: drafters propose tokens, a step verifies them; `drafter` is what both know of each other."""
>>>>>>> 32a9b83f4e7858728b935e563240113b96632385
