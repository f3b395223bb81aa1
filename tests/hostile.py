"Forty names that a file may have on Linux, each of which does something to a terminal, a table, a page or a file system."
import os

NAMES = [os.fsdecode(o) for o in (
    # a spreadsheet would run them
    b'=1+1.png', b'+1+1.png', b'-1+1.png', b'@SUM(1).png', b"=cmd|' C'!A0.png", b'a;=1+1.png', b' =1.png', '＝1+1.png'.encode(), b"'=1.png",
    # a program would take them for options, or for something else
    b'--help.png', b'$(touch x).png', b'~.png', b'NaN.png', b'%s{}.png', b'comma,"quoted".png', b'semi;colon.png',
    # controls, line breaks, commands to a terminal
    b'a\rb.png', b'a\nb.png', b'a\r\nb.png', b'\ttab.png', b'\x1b[2J\x1b[31mred.png', b'\x1b]0;title\x07.png', b'bell\x07.png', b'back\x08\x08\x08.png',
    b'del\x7f.png', '\x9b31mcsi.png'.encode(), 'next\x85line.png'.encode(), 'line\u2028break.png'.encode(),
    # letters that run the other way
    'rtl\u202egnp.png'.encode(), 'turned\u2066x\u2069.png'.encode(),
    # bytes that are no UTF-8, and names that look as they are written
    b'\xff.png', b'caf\xe9.png', rb'\xff.png', rb'back\slash.png', '\udcff'.encode('utf-8', 'surrogatepass')+b'.png',
    # long, foreign, and illegal elsewhere
    b'n'*233+b'.png', '名'.encode()*78+b'.png', '<b>&amp;😀.png'.encode(), b'a:b*?.png', b'x .png')]
