"""The whole story of a run: started or resumed, built, trained, evaluated, saved."""
