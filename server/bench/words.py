"""Common words: most are one token in any large vocabulary."""

from __future__ import annotations

_TEXT = """
about above after again air all along also always animal another answer any around ask away back because before
began begin being below between big book both boy bring build built call came car carry change children city close
cold color come could country cut day different does done door down each early earth eat end enough even every eye
face fall family far farm father feel feet few find fire first fish five follow food form found four friend from
full gave get girl give good got great green ground group grow half hand hard head hear heard help here high home
horse house idea into just keep kind knew know land large last late learn leave left letter life light line list
little live long look made make man many mark mean might mile money moon more morning most mother mountain move
much music must name near need never new next night north note number off often old once one only open order other
over own page paper part people picture place plan plant play point power press problem product question quick
rain ran read real red rest right river road rock room round rule run said same saw say school science sea second
see seem sentence set she ship short should show side simple since six size sleep slow small snow some song soon
sound south space spell stand star start state stay step still stood stop story street strong study such sun sure
table take talk teach tell ten test than that them then there these thing think three through time together told
too took top toward town travel tree true try turn two under unit until use usual very voice vowel wait walk want
war warm watch water way well went were west what wheel when where which while white who whole why will wind with
wonder wood word work world would write year yes young your
"""
WORDS = tuple(_TEXT.split())
