"""suite=overlap: does the all-reduce hide behind compute, and what is that worth?"""
