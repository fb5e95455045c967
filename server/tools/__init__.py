"""Calls of tools in what a model writes.

formats     the two ways of writing calls, and which one a model was taught
scanner     whether a text goes on as JSON, character by character
readers     the calls in each format, character by character
parser      an answer's text -> its content and its calls, piece by piece
grammar     a grammar that lets nothing but calls be written
"""
